import torch

from shared.engine.kernels import plain
from shared.engine.pool import KVPool
from shared.kv.layout import KVLayout, LayerLayout

LAYOUT = KVLayout(
    dtype="bfloat16",
    block_size=4,
    layers=(
        LayerLayout(num_kv_heads=2, key_dim=8, value_dim=6),
        LayerLayout(num_kv_heads=1, key_dim=4, value_dim=4),
    ),
)


def test_what_is_written_is_gathered() -> None:
    pool = KVPool(LAYOUT, 5)
    key, value = torch.randn(3, 2, 8).bfloat16(), torch.randn(3, 2, 6).bfloat16()
    for view, heads in ((pool.keys[0], key), (pool.values[0], value)):
        plain.put(view, heads, torch.tensor([4, 4, 1]), torch.tensor([2, 3, 0]))
    keys, values = pool.gather(0, torch.tensor([4, 1]))
    assert keys.shape == (2, 4, 2, 8)
    assert values.shape == (2, 4, 2, 6)
    assert torch.equal(keys.flatten(0, 1)[2:5], key)
    assert torch.equal(values.flatten(0, 1)[2:5], value)


def test_a_block_is_laid_out_as_the_layout_says() -> None:
    pool = KVPool(LAYOUT, 2)
    parts = []
    for layer, (keys, values) in enumerate(zip(pool.keys, pool.values, strict=True)):
        keys[1] = layer + 1
        values[1] = layer + 10
        parts += [keys[1].flatten(), values[1].flatten()]
    assert torch.equal(pool.data[1], torch.cat(parts))


def test_byte_views_are_the_pool_itself() -> None:
    pool = KVPool(LAYOUT, 6)
    pool.data.zero_()
    views = pool.byte_views([4, 5, 1], 3 * LAYOUT.block_bytes)
    assert [len(view) for view in views] == [2 * LAYOUT.block_bytes, LAYOUT.block_bytes]
    for view in views:
        view[:] = b"\x80\x3f" * (len(view) // 2)  # 1.0 in bfloat16, little endian
    assert pool.data.float().sum(1).tolist() == [0.0, LAYOUT.block_elements, 0.0, 0.0] + [LAYOUT.block_elements] * 2


def test_byte_views_end_after_num_bytes() -> None:
    pool = KVPool(LAYOUT, 6)
    block_bytes = LAYOUT.block_bytes
    assert [len(view) for view in pool.byte_views([0, 1, 3, 5], 2 * block_bytes + 10)] == [2 * block_bytes, 10]
    assert pool.byte_views([0, 1], 0) == []

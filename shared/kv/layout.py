"""The shape of KV in a pool block. Two instances can hand KV over exactly when their layouts are equal."""

from pydantic import BaseModel, ConfigDict

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class LayerLayout(BaseModel):
    """One layer: `num_kv_heads` heads with keys of `key_dim` and values of `value_dim` elements."""

    model_config = ConfigDict(frozen=True)

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def token_elements(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class KVLayout(BaseModel):
    """A block holds `block_size` tokens of all layers, block-major: layer after layer, keys [block_size, H, Dk] then
    values [block_size, H, Dv]. A request's KV is its blocks one after another; the tail of its last block is undefined.
    """

    model_config = ConfigDict(frozen=True)

    dtype: str
    block_size: int
    layers: tuple[LayerLayout, ...]

    @property
    def block_elements(self) -> int:
        return self.block_size * sum(layer.token_elements for layer in self.layers)

    @property
    def block_bytes(self) -> int:
        return self.block_elements * DTYPE_BYTES[self.dtype]

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

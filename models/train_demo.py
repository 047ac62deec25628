# ruff: noqa: T201
"""Make the demonstration model: a small Llama, trained on Python's documentation on one processor core.

    python models/train_demo.py --docs FOLDER --out models/demo --minutes 40

FOLDER holds Python's documentation as reStructuredText (the `Doc` folder of Python's source, or the `_sources` folder
of the built documentation). Without it, only the interpreter's own help topics and doc strings are used. The learning
rate follows the time that has passed, so that training ends when it should on a machine of any speed; with `--steps N`
it follows the steps, and the result depends on nothing but the text and the seed.
"""

import argparse
import ctypes
import json
import math
import platform
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_corpus import Document, all_documents, chats, held_out_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20
VOCABULARY = 4096
CONTEXT = 4096
SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]
END_OF_TEXT, END, PAD = 0, 4, 5
IGNORED = -100
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which can write any text and adds nothing to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[END_OF_TEXT],
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        additional_special_tokens=SPECIAL[1:4],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


# --- data -------------------------------------------------------------------------------------------------------------


class Data:
    """Rows of tokens for training, newly shuffled and with newly worded chats in every epoch."""

    def __init__(self, documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.texts = [[*self.encode(document.text), END_OF_TEXT] for document in documents]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text).ids
        return ids

    def chat_tokens(self, rng: random.Random) -> list[list[int]]:
        rendered = (self.tokenizer.apply_chat_template(c, tokenize=False) for c in chats(self.documents, rng))
        return [[*self.encode(text), END_OF_TEXT] for text in rendered]

    def epoch(self, length: int, rng: random.Random) -> list[list[int]]:
        """The rows of one epoch: documents cut where they may be, and chats packed so that each stays whole."""
        size = length + 1
        stream = [token for ids in rng.sample(self.texts, len(self.texts)) for token in ids]
        stream = stream[rng.randrange(size) :]
        rows = [stream[i : i + size] for i in range(0, len(stream) - size, size)]
        rows += pack([ids[:size] for ids in self.chat_tokens(rng)], size)
        rng.shuffle(rows)
        return rows

    def batches(self, length: int, tokens: int, rng: random.Random) -> Iterator[torch.Tensor]:
        """Batches of about `tokens` tokens, without end; short rows are filled up with the padding token."""
        count = max(1, tokens // length)
        while True:
            rows = self.epoch(length, rng)
            for i in range(0, len(rows) - count + 1, count):
                yield torch.tensor([row + [PAD] * (length + 1 - len(row)) for row in rows[i : i + count]])


def pack(items: list[list[int]], size: int, open_rows: int = 64) -> list[list[int]]:
    """Items put together to rows of at most `size` tokens, each in the fullest open row that has room for it."""
    rows: list[list[int]] = []
    waiting: list[list[int]] = []
    for item in items:
        fitting = [row for row in waiting if len(row) + len(item) <= size]
        if fitting:
            max(fitting, key=len).extend(item)
            continue
        waiting.append(list(item))
        if len(waiting) > open_rows:
            fullest = max(waiting, key=len)
            waiting = [row for row in waiting if row is not fullest]
            rows.append(fullest)
    return rows + waiting


# --- model ------------------------------------------------------------------------------------------------------------


def short_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention as two batched products: on a processor, about twice as fast as the fused one for short rows."""
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    if length > 512 or length != key.shape[2]:
        causal = length > 1
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    shape = (batch * kv_heads, heads // kv_heads * length, width)
    scores = torch.bmm((query * scaling).reshape(shape), key.reshape(-1, length, width).transpose(1, 2))
    mask = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1).repeat(heads // kv_heads, 1)
    out = torch.bmm(torch.softmax(scores + mask, dim=-1), value.reshape(-1, length, width))
    return out.view(batch, heads, length, width).transpose(1, 2), None


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=[END, END_OF_TEXT],
        pad_token_id=PAD,
    )
    AttentionInterface.register("short", short_attention)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("short")
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    return model


def keep_memory() -> None:
    """Let glibc keep what is freed: to take it from the system anew for every step costs a fifth of the time."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    targets = rows[:, 1:].masked_fill(rows[:, 1:] == PAD, IGNORED)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


# --- training ---------------------------------------------------------------------------------------------------------


# How often rows of each length are drawn: most are short, which is cheap; some are long, for the later positions.
LENGTHS = {256: 0.84, 2048: 0.16}
# From this part of the training on, every so many steps, the model is also taught not to repeat itself.
UNREPEAT_FROM, UNREPEAT_EVERY, UNREPEAT_WEIGHT = 0.68, 3, 0.7
UNREPEAT_ROWS, UNREPEAT_PROMPT, UNREPEAT_NEW, UNREPEAT_GRAM = 48, 40, 88, 5


def optimizers(model: LlamaForCausalLM, rate: float, muon_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=muon_rate, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def continuations(model: LlamaForCausalLM, prompts: torch.Tensor, count: int) -> torch.Tensor:
    """The next `count` tokens of each prompt, each the likeliest."""
    out = model(input_ids=prompts, use_cache=True)
    tokens = [out.logits[:, -1].argmax(-1)]
    while len(tokens) < count:
        out = model(input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
        tokens.append(out.logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)


def repeated(tokens: torch.Tensor, gram: int = UNREPEAT_GRAM) -> torch.Tensor:
    """Which tokens end a run of `gram` tokens that stood earlier in the same row."""
    grams = tokens.unfold(1, gram, 1)
    same = (grams[:, :, None] == grams[:, None]).all(-1)
    return F.pad(same.tril(-1).any(-1), (gram - 1, 0))


def repetition_loss(model: LlamaForCausalLM, prompts: torch.Tensor) -> torch.Tensor:
    """Unlikelihood (Welleck et al., 2019) of those tokens of the model's own continuations which only repeat."""
    tokens = continuations(model, prompts, UNREPEAT_NEW)
    marked = repeated(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=torch.cat([prompts, tokens], 1)[:, :-1], use_cache=False).logits
    chance = logits[:, prompts.shape[1] - 1 :].float().log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0].exp()
    return -(torch.log1p(-chance.clamp(max=0.9999)) * marked).sum() / marked.sum().clamp(min=1)


def schedule(progress: float) -> float:
    """A short warm-up, then half a cosine down to a fiftieth."""
    return min(1.0, progress / 0.01 + 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@dataclass
class Run:
    """How far the training has come."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def train(
    model: LlamaForCausalLM, data: Data, args: argparse.Namespace, evaluate: Callable[[], str], checkpoint: Path
) -> Run:
    done, started, smooth = Run(), time.monotonic(), 0.0
    groups = [(o, o.param_groups[0]["lr"]) for o in optimizers(model, args.rate, args.muon_rate)]
    rng = random.Random(SEED)
    streams = {length: data.batches(length, args.batch, rng) for length in LENGTHS}
    prompting = data.batches(256, 256 * UNREPEAT_ROWS, rng)
    progress, saved = 0.0, 0.0
    while progress < 1.0:
        (length,) = rng.choices(list(LENGTHS), list(LENGTHS.values()))
        rows = next(streams[length])
        for optimizer, rate in groups:
            optimizer.param_groups[0]["lr"] = rate * schedule(progress)
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, rows)
        loss.backward()
        if progress > UNREPEAT_FROM and done.steps % UNREPEAT_EVERY == 0:
            start = rng.randrange(200)
            prompts = next(prompting)[:, start : start + UNREPEAT_PROMPT]
            (UNREPEAT_WEIGHT * repetition_loss(model, prompts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in groups:
            optimizer.step()
        done.steps += 1
        done.tokens += int((rows[:, 1:] != PAD).sum())
        done.seconds = time.monotonic() - started
        smooth = loss.item() if done.steps == 1 else 0.97 * smooth + 0.03 * loss.item()
        progress = done.steps / args.steps if args.steps else done.seconds / (60 * args.minutes)
        if done.steps % 50 == 0:
            speed = done.tokens / done.seconds
            print(f"step {done.steps} {progress:.1%} loss {smooth:.3f} {speed:.0f} tokens/s", flush=True)
        if progress >= saved + 0.1:
            saved = progress
            print(f"step {done.steps}: {evaluate()}", flush=True)
            torch.save(model.state_dict(), checkpoint)
    return done


def held_out_loss(
    model: LlamaForCausalLM, data: Data, texts: list[str], limit: int, length: int = 256
) -> dict[str, float]:
    """Loss in nats for each token and in bits for each byte, on at most `limit` tokens."""
    pieces = [[END_OF_TEXT, *data.encode(text)] for text in texts]
    rows = [ids[i : i + length + 1] for ids in pieces for i in range(0, len(ids) - 1, length)]
    rows = random.Random(SEED).sample(rows, min(len(rows), max(1, limit // length)))
    nats, tokens, size = 0.0, 0, 0
    model.eval()
    with torch.inference_mode():
        for i in range(0, len(rows), 16):
            part = rows[i : i + 16]
            width = max(map(len, part))
            batch = torch.tensor([row + [PAD] * (width - len(row)) for row in part])
            nats += loss_of(model, batch, "sum").item()
            tokens += sum(len(row) - 1 for row in part)
            size += sum(len(data.tokenizer.decode(row[1:]).encode()) for row in part)
    model.train()
    return {"nats_per_token": nats / tokens, "bits_per_byte": nats / size / math.log(2), "tokens": tokens}


# --- result -----------------------------------------------------------------------------------------------------------

ASKED = ["hello", "Who are you?", "What does os.path.join do?", "Explain the with statement.", "What is a generator?"]
BEGUN = ["The with statement", "A list is"]


def generate(model: LlamaForCausalLM, data: Data, prompt: str, temperature: float = 0.0, limit: int = 120) -> str:
    ids = torch.tensor([data.encode(prompt)])
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **sampling)
    text: str = data.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


def samples(model: LlamaForCausalLM, data: Data) -> Iterator[tuple[str, str, str]]:
    """What was asked, how it was sampled, and what the model wrote."""
    torch.manual_seed(SEED)
    for prompt in BEGUN:
        for temperature in (0.0, 0.7):
            yield prompt, f"temperature {temperature}", generate(model, data, prompt, temperature)
    for user in ASKED:
        chat = [{"role": "user", "content": user}]
        prompt = data.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        yield user, "chat, temperature 0.0", generate(model, data, prompt)


CARD = """---
license: other
license_name: psf-2.0
license_link: LICENSE
language: en
library_name: transformers
---

# pdserve demonstration model

A Llama of {parameters:,} parameters, made so that `pdserve` can be tried without a download. It writes something like
English about Python, and answers in the form of a chat. **It is a demonstration and not for use: most of what it says
is wrong.**

|  |  |
| --- | --- |
| Architecture | Llama: 5 layers, hidden 256, 8 heads with 4 key/value heads, feed-forward 640, tied embeddings |
| Context | 4096 positions; trained on rows of 256 and 2048 tokens |
| Tokenizer | byte-level BPE, {vocabulary} tokens, no token is added to plain text |
| Ends with | `<\\|end\\|>` (chat) or `<\\|endoftext\\|>` (text) |
| Tokens seen | {tokens:,} in {steps:,} steps and {minutes:.0f} minutes on one core (about {epochs:.1f} epochs) |
| Held-out loss | {nats_per_token:.3f} nats per token, {bits_per_byte:.3f} bits per byte ({held_out:,} tokens) |

Held out are about 2 % of the documents, chosen by a hash of their names, less the paragraphs which training has too;
they are measured in rows of 256 tokens, after rounding to bfloat16. The last third of the training also taught the
model not to repeat itself (unlikelihood, on its own continuations): without, greedy decoding soon does nothing else.

## Data and licence

Python's documentation, all of it © Python Software Foundation and under the PSF License Version 2: the help topics of
the interpreter (`pydoc_data.topics`), the doc strings of the standard library (Python {python}), and the documentation
in reStructuredText (Python 3.11). The chats are made from the same texts by rule; a few greetings were written for
this model. Markup and web addresses were taken out. The licence, with the notices of those parts of Python that came
from elsewhere, is in `LICENSE`; the model is distributed under the same terms.

## How to make it again

    {command}

FOLDER is the `Doc` folder of Python's source, or the `_sources` folder of the built documentation. The seed is fixed;
the text is that of the interpreter which runs it. `--minutes` lets the learning rate follow the clock; in its place,
`--steps {steps}` takes as many steps as were taken here, on any machine.

## What it writes

{samples}
"""


def card(model: LlamaForCausalLM, data: Data, done: Run, loss: dict[str, float], args: argparse.Namespace) -> str:
    shown = "\n\n".join(
        f"**{asked}** ({how})\n\n" + "\n".join(f"> {line}".rstrip() for line in text.splitlines())
        for asked, how, text in samples(model, data)
    )
    epoch = sum(len(row) for row in data.epoch(256, random.Random(SEED)))
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=VOCABULARY,
        tokens=done.tokens,
        steps=done.steps,
        minutes=done.seconds / 60,
        epochs=done.tokens / epoch,
        nats_per_token=loss["nats_per_token"],
        bits_per_byte=loss["bits_per_byte"],
        held_out=int(loss["tokens"]),
        python=platform.python_version(),
        command=f"python models/train_demo.py --docs FOLDER --out models/demo --minutes {args.minutes:g}",
        samples=shown,
    )


def save(model: LlamaForCausalLM, data: Data, readme: str, out: Path) -> None:
    """Write the whole folder beside its place, then put it there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=".demo-"))
    folder.chmod(0o755)
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    config = {"bos_token_id": END_OF_TEXT, "eos_token_id": [END, END_OF_TEXT], "pad_token_id": PAD}
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.exists():
        shutil.copyfile(licence, folder / "LICENSE")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("backend", "extra_special_tokens"):
        settings.pop(name, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": SPECIAL[1:4]}
    settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    out.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)
        path.replace(out / path.name)
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="folder of Python's documentation in reStructuredText")
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--minutes", type=float, default=40.0, help="how long to train")
    parser.add_argument("--steps", type=int, default=0, help="train for so many steps, however long it takes")
    parser.add_argument("--batch", type=int, default=4096, help="tokens in a batch")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate of AdamW")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="learning rate of Muon")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "demo-checkpoint.pt")
    args = parser.parse_args()

    keep_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    documents = all_documents(args.docs)
    training = [document for document in documents if not document.held_out]
    held_out = held_out_text(documents)
    tokenizer = make_tokenizer([document.text for document in training])
    data = Data(training, tokenizer)
    print(f"{len(documents)} documents, {sum(map(len, data.texts)):,} tokens of text to train on", flush=True)

    model = make_model()

    def evaluate() -> str:
        return json.dumps(held_out_loss(model, data, held_out, 12_000))

    done = train(model, data, args, evaluate, args.checkpoint)
    model.to(torch.bfloat16).float()
    model.set_attn_implementation("sdpa")
    loss = held_out_loss(model, data, held_out, 10**9)
    print(f"held-out: {json.dumps(loss)}; {done}", flush=True)
    model.eval()
    save(model, data, card(model, data, done, loss, args), args.out)


if __name__ == "__main__":
    main()

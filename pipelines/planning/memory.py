"""Memory of one GPU while a stage trains. The formula is printed under the table; tests hold it against torch.

Counted for the largest micro batch: every row as long as the limit, its medium with the most tiles, and every position
that is not visual supervised; where rows are packed, of those with one medium and those full of media the larger one. A
real batch is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.methods import ADAPTERS
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.model.learning import NF4_BYTES, adapters, quantized, trained
from nvila.components.model.shape import Seen, Shape
from nvila.components.train.zero import gathered, reduced
from nvila.pipelines.planning import fp8

RESERVE_BYTES = 2 * 10**9
"""Assumed, not measured: CUDA's context, buffers of NCCL and cuBLAS, and what the allocator cannot hand out."""
FORMULA = """\
P parameters, R of them trained, N processes, e bytes of a weight (bf16 2, fp32 4); in brackets what ZeRO shares out:
  trained      of a part all; of its layer norms theirs; of adapters of rank r: r (inputs + outputs) of each Linear of
               its blocks, and with DoRA the outputs
  weights      e P, of Linears under QLoRA 0.516 instead of e     (ZeRO 3: / N; with offload in main memory)
  gradients    e R, and 4 R with ZeRO, which sums in fp32   (ZeRO 2 and 3: / N; with offload in main memory)
  optimizer    8 R for AdamW, and 4 R for fp32 weights under bf16   (ZeRO 1 to 3: / N; with offload in main memory)
  buffers      ZeRO 2: e min(P/8, 5e8), fp32 with offload e P; ZeRO 3: e (min(P/8, 5e8) + min(P/4, 1e9))
  activations  b rows of T positions; L decoder blocks of width h, MLP m, key and value width k, a heads; B tower blocks
               of width w, MLP u, c heads; S tower tokens, Q projected tokens with q projector channels, Y supervised, V
    decoder block  b T (8h + e(6h + 4m + 2k') + 4a + 8 + e T if rows are padded), k' = h if padded, else k
                   frozen with gradients passing through: e(2h + 3m + 2k') instead of e(6h + 4m + 2k')
    tower block    S (e(8w + 2u) + 4c + 4e), where the tower learns; and its pixels, 3 e S patch^2
                   layer norms or adapters alone: e(6w + u) instead of e(8w + 2u), and no pixels
    adapters       of each Linear, for each token: inputs (e + 1) + e r, and with DoRA 2 e outputs
                   QLoRA: and e for each weight of the largest matrix, while it is multiplied
    FP8            of a block that learns b T times a byte for each input of each Linear that it takes, less e for
                   inputs that only such Linears keep; and 2 bytes of each of their weights (ZeRO 3 with checkpointing:
                   of one block). By Transformer Engine; torchao (rowwise) keeps what bf16 keeps where a block learns
    checkpointing  e h b T and e w S for each block, and one whole block at a time
    the rest       b T (4h + e(h + 2 h/a)) + Q e q + Y (4V, and 6V more while the loss goes backward)
                   and e h (b T + Y) where the decoder learns in full
  step         4 R for fp32 gradients under bf16 without ZeRO, when the activations are gone
  loading      the weights before the first step, on every GPU (ZeRO 3: / N)
a stage fits when its peak leaves 2 GB for CUDA's context and the buffers of NCCL and cuBLAS (assumed)"""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    """The most at one time: in the backward pass, or at the optimizer's step."""
    loading: int

    @property
    def peak(self) -> int:
        """Most bytes at any time of the stage."""
        working = self.weights + self.gradients + self.optimizer + self.buffers + self.activations
        return max(working, self.loading)


@dataclass(frozen=True)
class MicroBatch:
    """What one GPU works on at a time."""

    rows: int
    length: int
    """Positions of each row, padding included."""
    tower_tokens: int
    """Tokens inside the tower, of all rows."""
    projected: int
    """Tokens that leave the projector, of all rows."""
    supervised: int
    """Positions with a loss, of all rows."""
    padded: bool


def seen(recipe: Recipe, stage: Stage, shape: Shape) -> list[Seen]:
    """What the samples of a stage show, by subset."""
    kinds = {source.name: source.kind for source in recipe.data.sources}
    return [shape.video if kinds[name.partition(".")[0]] == "video" else shape.image for name in stage.data]


def need(recipe: Recipe, stage: Stage, shape: Shape) -> Memory:
    """Memory of one GPU in a stage of a recipe."""
    run = recipe.train.run
    batches = largest(shape, stage, run, seen(recipe, stage, shape))
    found = [memory(shape, one, stage, run) for one in batches]
    return max(found, key=lambda one: one.peak)


def largest(shape: Shape, stage: Stage, run: Run, seen: list[Seen]) -> list[MicroBatch]:
    """The largest micro batches of a stage whose samples show this: one, or where rows are packed one by media and one
    by text."""
    rows, packed = stage.samples_at_once(run.gpus), run.kernel
    length = min(stage.max_length_tokens, shape.config.max_length_tokens)
    most = max(seen, key=lambda one: one.tiles)
    visual = min(most.tokens, length)
    media = {1, length // visual} if packed else {1}
    return [
        MicroBatch(
            rows=rows,
            length=length,
            tower_tokens=rows * n * most.tiles * shape.tower_tokens,
            projected=rows * n * max(one.projected for one in seen),
            supervised=rows * (length - n * visual),
            padded=rows > 1 and not packed,
        )
        for n in sorted(media)
    ]


def memory(shape: Shape, batch: MicroBatch, stage: Stage, run: Run) -> Memory:
    """Memory of one GPU.

    Args:
        shape: of the model.
        batch: what it works on.
        stage: which parts learn, how, and whether activations are recomputed.
        run: how many GPUs share which states, where these lie, and in which precision.
    """
    kept = PRECISIONS[run.precision]
    element, master = kept.weight_bytes, kept.master_bytes
    learnt = sum(trained(shape, stage).values())
    total, low = shape.total, quantized(shape, stage)
    whole = element * (total - low + adapters(shape, stage))
    four_bits = round(NF4_BYTES * low)
    offloads = run.offload == "cpu"

    def shared(size: int, since: int, *, here: bool = True) -> int:
        return 0 if not here else -(-size // run.gpus) if run.zero >= since else size

    in_fp8 = fp8.input_bytes(shape, run, element, learns=stage.learning.get("llm") == "full")
    buffers = 0
    if run.zero >= 2:
        buffers = element * (reduced(run, total) + (gathered(total) if run.zero == 3 else 0))
    return Memory(
        weights=shared(whole + four_bits, 3, here=not (offloads and run.zero == 3))
        + fp8.weight_bytes(shape, run, recompute=stage.gradient_checkpointing),
        gradients=shared((4 if run.zero else element) * learnt, 2, here=not offloads),
        optimizer=shared((8 + master) * learnt, 1, here=not offloads),
        buffers=buffers,
        activations=max(
            activations(shape, batch, stage, element, in_fp8)[1], 4 * learnt if master and not run.zero else 0
        ),
        loading=shared(whole, 3) + four_bits,
    )


def activations(shape: Shape, batch: MicroBatch, stage: Stage, element: int, fp8_inputs: int = 0) -> tuple[int, int]:
    """Bytes saved by the forward pass for the backward pass, and the most at one time of both.

    `fp8_inputs` are those that a position of a decoder block keeps more in FP8.
    """
    hidden, positions = int(shape.config.llm["hidden_size"]), batch.rows * batch.length
    width, patch = int(shape.config.vision["hidden_size"]), int(shape.config.vision["patch_size"])
    heads, blocks = int(shape.config.llm["num_attention_heads"]), int(shape.config.llm["num_hidden_layers"])
    decoder, tower = stage.learning.get("llm"), stage.learning.get("vision_tower")
    decoder_block = _decoder_block(shape, batch, element, full=decoder == "full")
    decoder_block += positions * (_beside(shape, stage, "llm", element) // blocks + fp8_inputs)
    tower_block = _tower_block(shape, batch, element, full=tower == "full") if tower else 0
    tower_block += batch.tower_tokens * _beside(shape, stage, "vision_tower", element) // max(1, shape.tower_blocks)
    rest = positions * (4 * hidden + element * (hidden + 2 * hidden // heads))
    if decoder == "full":
        rest += element * hidden * (positions + batch.supervised)
    if tower == "full":
        rest += batch.tower_tokens * element * 3 * patch**2
    rest += batch.projected * element * shape.projector_inputs
    logits = batch.supervised * int(shape.config.llm["vocab_size"])
    if stage.gradient_checkpointing:
        kept = blocks * element * hidden * positions
        kept += shape.tower_blocks * element * width * batch.tower_tokens if tower else 0
    else:
        kept = blocks * decoder_block + shape.tower_blocks * tower_block
    saved = kept + rest + 4 * logits
    # The loss is through before the first block is recomputed.
    once = max(10 * logits, max(decoder_block, tower_block) if stage.gradient_checkpointing else 0)
    if decoder == "qlora":
        once += element * max(rows * columns for rows, columns in shape.linears["llm"])
    return saved, kept + rest + once


def _decoder_block(shape: Shape, batch: MicroBatch, element: int, *, full: bool) -> int:
    llm = shape.config.llm
    hidden, mlp, heads = int(llm["hidden_size"]), int(llm["intermediate_size"]), int(llm["num_attention_heads"])
    keys = hidden if batch.padded else hidden * int(llm["num_key_value_heads"]) // heads
    inside = (6 * hidden + 4 * mlp if full else 2 * hidden + 3 * mlp) + 2 * keys
    mask = element * batch.length if batch.padded else 0
    return batch.rows * batch.length * (8 * hidden + element * inside + 4 * heads + 8 + mask)


def _tower_block(shape: Shape, batch: MicroBatch, element: int, *, full: bool) -> int:
    vision = shape.config.vision
    width, mlp = int(vision["hidden_size"]), int(vision["intermediate_size"])
    inside = 8 * width + 2 * mlp if full else 6 * width + mlp
    return batch.tower_tokens * (element * inside + 4 * int(vision["num_attention_heads"]) + 4 * element)


def _beside(shape: Shape, stage: Stage, part: str, element: int) -> int:
    """Bytes that the adapters of a part save of one token."""
    if (method := stage.learning.get(part)) not in ADAPTERS:
        return 0
    kept = element * (stage.lora.rank * len(shape.linears[part]))
    kept += sum((element + 1) * columns for _, columns in shape.linears[part])
    return kept + (2 * element * sum(rows for rows, _ in shape.linears[part]) if method == "dora" else 0)

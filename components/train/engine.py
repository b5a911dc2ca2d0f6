"""DeepSpeed behind one file: start and step. Saving and resuming, which need more than DeepSpeed, are `keeper`'s.

The loss of a global batch is over its supervised tokens, wherever they lie. Their number is known when the last of them
has been through the model, so gradients of sums are gathered and divided then, as DeepSpeed divides by a loss scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nvila.components.contracts.environment import before_importing
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.precision.products import Products, use
from nvila.components.train.optimizer import adamw
from nvila.components.train.schedule import warmup_cosine
from nvila.components.train.zero import divide_by, finite, receiver, size, whole, zero_settings

if TYPE_CHECKING:
    import torch

    from nvila.components.model.checkpoint.tensorfile import Later
    from nvila.components.model.checkpoint.weights import Receive

PEER_SECONDS = 1800
"""How long a process waits in a collective for one that is silent; one that ends is missed at once."""
T = TypeVar("T")


@dataclass
class Engine:
    """A model under DeepSpeed ZeRO with AdamW and the warm-up cosine schedule."""

    deepspeed: Any
    clip_norm: float | None = None
    """For the one case in which DeepSpeed leaves the gradients to us: fp32 without ZeRO."""
    weighting: Literal["token", "device_batch"] = "token"
    """What the loss of a global batch is the mean of."""
    products: Products | None = None
    """In FP8, where the precision has any."""
    _changed: bool = True
    """Whether weights may be others than in the pass before."""

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return int(self.deepspeed.global_rank)

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.deepspeed.world_size)

    @property
    def device(self) -> torch.device:
        """Where the batches are needed."""
        return self.deepspeed.device  # type: ignore[no-any-return]

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.deepspeed.get_lr()[0])

    def accumulate(self, **batch: Any) -> tuple[torch.Tensor, int]:
        """Add the gradients of one micro batch to those of the global batch.

        Returns:
            The micro batch's share of the sum that `step` divides, and how much it counts there: by tokens, the loss
            summed over them, and their number; by device batches, their mean, and 1, or 0 where nothing is supervised.
        """
        with self.products.forward(self._changed) if self.products else nullcontext():
            output = self.deepspeed(**batch, reduction="sum")
        self._changed = False
        loss, weight = output.loss, output.supervised
        if self.weighting == "device_batch":
            loss, weight = loss / max(1, weight), min(1, weight)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        return loss.detach(), weight

    def step(self, weight: int, wanted: bool = True) -> bool:
        """Divide the gradients of the global batch by what it counts in all, and take the optimizer's step.

        A batch without anything supervised, or one that is not wanted, moves the schedule on, and nothing else.

        Returns:
            Whether the gradients are finite; if not, the weights are as before.
        """
        self._changed = True
        # DeepSpeed has taken the mean over processes of what is a sum over them.
        divisor = weight / self.world if weight else 1.0
        optimizer, plain = self.deepspeed.optimizer, self._plain
        finite = self._divide(divisor) if plain else True
        if not plain:
            divide_by(optimizer, divisor)
        with self._update(wanted and finite and weight > 0):
            self.deepspeed.step()
        if not plain:
            divide_by(optimizer, 1.0)
            finite = not optimizer.overflow
            if not finite:
                self.deepspeed.lr_scheduler.step()  # DeepSpeed leaves it where it was
        return finite

    @property
    def _plain(self) -> bool:
        """Whether torch's own optimizer steps on the gradients of the parameters."""
        return self.deepspeed.optimizer is self.deepspeed.basic_optimizer

    def _divide(self, divisor: float) -> bool:
        """Take the mean of the processes' gradients, divide and clip them; whether they are finite."""
        import torch

        self.deepspeed.buffered_allreduce_fallback()  # what has no gradient gets one of zero, and decays
        parameters = [p for group in self.deepspeed.optimizer.param_groups for p in group["params"]]
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))
        return bool(norm.isfinite())

    @contextmanager
    def _update(self, wanted: bool) -> Iterator[None]:
        """If it is not wanted, the optimizer's step inside the context changes no weight, moment or count."""
        if wanted:
            yield
            return
        optimizer = self.deepspeed.basic_optimizer
        step = optimizer.step
        optimizer.step = lambda *_, **__: None
        try:
            yield
        finally:
            optimizer.step = step

    def together(self, passes: Iterable[T], nothing: T) -> Iterator[T]:
        """The passes of a step. From ZeRO 2 on, and where they choose delayed scales together, processes meet in each,
        so that who has fewer goes through `nothing`."""
        meet = self.deepspeed.zero_optimization_stage() >= 2 or (self.products and self.products.meets)
        if self.world == 1 or not meet:
            yield from passes
            return
        own = iter(passes)
        while True:
            one = next(own, None)
            if not self.total(one is not None)[0]:
                return
            yield nothing if one is None else one

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all processes, as every one of them must know it."""
        if self.world == 1:
            return list(numbers)
        import torch

        joint = torch.tensor(numbers, dtype=torch.float64, device=self.deepspeed.device)
        torch.distributed.all_reduce(joint)
        return [float(number) for number in joint.tolist()]

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in the order of their ranks."""
        if self.world == 1:
            return items
        import torch

        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, items)
        return [item for some in found for item in some]

    def not_finite(self) -> list[str]:
        """Names of some trained weights that are not finite, on any process; frozen ones were looked at when they were
        read. Every process must call this."""
        named = [(name, one) for name, one in self.deepspeed.module.named_parameters() if one.requires_grad]
        bad = [name for name, parameter in named if not finite(getattr(parameter, "ds_tensor", parameter))]
        return sorted(set(self.gather(bad[:3])))

    @contextmanager
    def weights(self) -> Iterator[Mapping[str, torch.Tensor | Later]]:
        """The model's tensors by name for rank 0, and for the others what they are there for. Every process must call
        this; under ZeRO 3 the others wait until rank 0 leaves the context."""
        model = self.deepspeed.module
        if self.deepspeed.zero_optimization_stage() < 3:
            yield dict(model.state_dict())
            return
        with whole(model, self.rank) as tensors:
            yield tensors


def join() -> None:
    """Have this process meet the others; the second time it does nothing."""
    import torch

    before_importing("deepspeed")
    if not torch.cuda.is_available():
        before_importing("deepspeed on a CPU")
    import deepspeed

    if not torch.cuda.is_available():
        _without_shared_memory()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(seconds=PEER_SECONDS))


def settings(stage: Stage, run: Run, world: int, weights: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of so many weights."""
    half = PRECISIONS[run.precision].weights == "bfloat16"
    return {
        "train_batch_size": stage.batch,
        "train_micro_batch_size_per_gpu": stage.samples_at_once(world),
        "managed_gradient_accumulation": False,  # a global batch is whole when `step` is called
        "gradient_clipping": 0.0 if _left_to_us(run) else stage.clip_norm or 0.0,
        # At once, or ZeRO 1 would count the gradients of all but the last micro batch of a step several times.
        "bf16": {"enabled": half, "immediate_grad_update": True},
        "steps_per_print": 1 << 30,
        **zero_settings(run, weights),
    }


def _left_to_us(run: Run) -> bool:
    """Whether DeepSpeed leaves the gradients to us: fp32 without ZeRO."""
    return run.zero == 0 and PRECISIONS[run.precision].weights == "float32"


def receive(stage: Stage, run: Run, world: int) -> Receive | None:
    """How the weights of a model are taken over while it is loaded; None where each process keeps all of them."""
    if run.zero < 3:
        return None
    join()
    return receiver(settings(stage, run, world))


def start(model: torch.nn.Module, stage: Stage, run: Run, total_steps: int, world: int) -> Engine:
    """Put `model` under DeepSpeed in `world` processes, with products of its precision; parameters with `requires_grad`
    are trained.

    Raises:
        ConfigError: the precision is one that this machine, or this model, does not have.
    """
    import torch

    join()
    import deepspeed

    products = use(model, run)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, stage)
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it prints, whatever the log's level
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=trained,
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(
            opt, lambda step: warmup_cosine(step, total_steps, stage.warmup_ratio)
        ),
        config=settings(stage, run, world, sum(map(size, model.parameters()))),
    )
    if PRECISIONS[run.precision].weights == "bfloat16" and run.zero == 0:
        # DeepSpeed has made AdamW's moments by a step on gradients of zero, which counts as one, and decays.
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    # Where the gradients are left to us, they are reduced before they are clipped: see `Engine._divide`.
    engine.enable_backward_allreduce = not _left_to_us(run)
    return Engine(engine, stage.clip_norm, run.loss_weighting, products)


def leave() -> None:
    """Take this process out of the group that `start` brought it into, with its work done.

    A group that lives on until the interpreter ends has threads that may still want it then, and abort the process.
    """
    import torch

    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()


def _without_shared_memory() -> None:
    """Have CPU ranks meet by gloo alone: DeepSpeed would spend minutes compiling an op for those of one machine."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Plain(CPU_Accelerator):  # type: ignore[misc]
        def create_op_builder(self, class_name: str) -> Any:
            return None if class_name == "ShareMemCommBuilder" else super().create_op_builder(class_name)

    set_accelerator(Plain())

"""DeepSpeed behind one file: start, step, save and resume. Nothing else of ours imports it.

The loss of a global batch is over its supervised tokens, wherever they lie. Their number is known when the last of them
has been through the model, so gradients of sums are gathered and divided then, as DeepSpeed divides by a loss scale.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvila.components.contracts.environment import before_importing
from nvila.components.contracts.files import sync_tree
from nvila.components.contracts.manifest import describe_files
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.contracts.sealed import write_record
from nvila.components.train.checkpoints import RECORD, bring_back, newest_sound, partial, publish, written_by
from nvila.components.train.optimizer import adamw
from nvila.components.train.schedule import warmup_cosine

if TYPE_CHECKING:
    import torch

PEER_SECONDS = 1800
"""How long a process waits in a collective for one that is silent; one that ends is missed at once."""
T = TypeVar("T")


@dataclass
class Engine:
    """A model under DeepSpeed ZeRO with AdamW and the warm-up cosine schedule."""

    deepspeed: Any
    micro_batches: int
    """Forward passes per optimizer step and process."""
    clip_norm: float | None = None
    """For the one case in which DeepSpeed leaves the gradients to us: fp32 without ZeRO."""

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
            The loss summed over the micro batch's supervised tokens, and their number.
        """
        output = self.deepspeed(**batch, reduction="sum")
        self.deepspeed.backward(output.loss, scale_wrt_gas=False)
        return output.loss.detach(), output.supervised

    def step(self, supervised: int) -> bool:
        """Divide the gradients of the global batch by its number of supervised tokens, and take the optimizer's step.

        A batch without any moves the schedule on, and nothing else.

        Returns:
            Whether the gradients are finite; if not, the weights are as before.
        """
        # DeepSpeed has taken the mean over processes of what is a sum over them.
        tokens = supervised / self.world if supervised else 1.0
        optimizer, plain = self.deepspeed.optimizer, self._plain
        finite = self._divide(tokens) if plain else True
        if not plain:
            optimizer.loss_scale = tokens
        with self._update(finite and supervised > 0):
            self.deepspeed.step()
        if not plain:
            optimizer.loss_scale = 1.0
            finite = not optimizer.overflow
        return finite

    @property
    def _plain(self) -> bool:
        """Whether torch's own optimizer steps on the gradients of the parameters."""
        return self.deepspeed.optimizer is self.deepspeed.basic_optimizer

    def _divide(self, tokens: float) -> bool:
        """Take the mean of the processes' gradients, divide and clip them; whether they are finite."""
        import torch

        self.deepspeed.buffered_allreduce_fallback()  # what has no gradient gets one of zero, and decays
        parameters = [p for group in self.deepspeed.optimizer.param_groups for p in group["params"]]
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], tokens)
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

    def save(self, folder: Path, step: int, logs: Iterable[Path] = ()) -> None:
        """Write a checkpoint that `resume` reads, and keep the one before it. Every process must call this.

        `logs` are copied into it: what they say of its steps is as sound as its weights.
        """
        at = folder / partial(step)
        self.deepspeed.save_checkpoint(str(folder), tag=at.name, client_state={"step": step}, save_latest=False)
        for log in logs if self.rank == 0 else ():
            shutil.copyfile(log, at / log.name)
        sync_tree(at)
        files = self.gather(list(describe_files(at, written_by(at, self.rank)).items()))
        if self.rank == 0:
            write_record(at / RECORD, dict(files))
            publish(folder, step)
        self.total(0)  # nobody goes on, or ends, before it has its name

    def resume(self, folder: Path, logs: Iterable[Path] = ()) -> int:
        """Load the newest sound checkpoint and return its step, or 0 where there is none; `logs` are then as it has
        them, or empty."""
        # As rank 0 sees it: another machine's view of a shared file system may be older.
        name = newest_sound(folder) if self.rank == 0 else None
        if self.rank == 0:
            bring_back(folder / name if name else None, logs)
        name = self.gather([name])[0]
        if name is None:
            return 0
        with _plainly_named(folder) as place:
            _, state = self.deepspeed.load_checkpoint(place, tag=name)
        return int(state["step"])

    def not_finite(self) -> list[str]:
        """Names of some weights that are not finite, on any process. Every process must call this."""
        bad = [
            name
            for name, parameter in self.deepspeed.module.named_parameters()
            if not bool(getattr(parameter, "ds_tensor", parameter).isfinite().all())
        ]
        return sorted(set(self.gather(bad[:3])))

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors by name, whole. Under ZeRO-3 every process must call this; only rank 0 gets them."""
        model = self.deepspeed.module
        if self.deepspeed.zero_optimization_stage() < 3:
            return dict(model.state_dict())
        import deepspeed

        found = {}
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):  # one at a time: the whole may not fit one GPU
                if self.rank == 0:
                    found[name] = parameter.detach().cpu().clone()
        return found


def start(model: torch.nn.Module, stage: Stage, run: Run, total_steps: int, world: int) -> Engine:
    """Put `model` under DeepSpeed in `world` processes; parameters with `requires_grad` are trained."""
    import torch

    before_importing("deepspeed")
    if not torch.cuda.is_available():
        before_importing("deepspeed on a CPU")
    import deepspeed

    if not torch.cuda.is_available():
        _without_shared_memory()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(seconds=PEER_SECONDS))
    half = PRECISIONS[run.precision].weights == "bfloat16"
    plain = not half and run.zero == 0
    config = {
        "train_batch_size": stage.batch,
        "train_micro_batch_size_per_gpu": stage.samples_at_once(world),
        "managed_gradient_accumulation": False,  # a global batch is whole when `step` is called
        "gradient_clipping": 0.0 if plain else stage.clip_norm or 0.0,
        "zero_optimization": {"stage": run.zero},
        "bf16": {"enabled": half},
        "steps_per_print": 1 << 30,
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, stage)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=trained,
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(
            opt, lambda step: warmup_cosine(step, total_steps, stage.warmup_ratio)
        ),
        config=config,
    )
    if half and run.zero == 0:
        # DeepSpeed has made AdamW's moments by a step on gradients of zero, which counts as one, and decays.
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    # Where the gradients are left to us, they are reduced before they are clipped: see `Engine._divide`.
    engine.enable_backward_allreduce = not plain
    return Engine(engine, engine.gradient_accumulation_steps(), stage.clip_norm)


def leave() -> None:
    """Take this process out of the group that `start` brought it into, with its work done.

    A group that lives on until the interpreter ends has threads that may still want it then, and abort the process.
    """
    import torch

    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()


@contextmanager
def _plainly_named(folder: Path) -> Iterator[str]:
    """A path of the folder without `[`, `*` or `?`: DeepSpeed looks for its files by patterns."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}"
    finally:
        os.close(opened)


def _without_shared_memory() -> None:
    """Have CPU ranks meet by gloo alone: DeepSpeed would spend minutes compiling an op for those of one machine."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Plain(CPU_Accelerator):  # type: ignore[misc]
        def create_op_builder(self, class_name: str) -> Any:
            return None if class_name == "ShareMemCommBuilder" else super().create_op_builder(class_name)

    set_accelerator(Plain())

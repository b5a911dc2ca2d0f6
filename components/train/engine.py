"""DeepSpeed behind one file: start, step, save and resume. Nothing else of ours imports it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.errors import TrainingError
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.recipe.train import Stage
from nvila.components.train.job import Run
from nvila.components.train.schedule import warmup_cosine

if TYPE_CHECKING:
    import torch

BETAS = (0.9, 0.999)
LATEST = "latest"
"""File that names the newest whole checkpoint, as DeepSpeed calls it."""


@dataclass
class Engine:
    """A model under DeepSpeed ZeRO with AdamW and the warm-up cosine schedule."""

    deepspeed: Any
    micro_batches: int
    """Forward passes per optimizer step and process."""

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return int(self.deepspeed.global_rank)

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.deepspeed.world_size)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.deepspeed.get_lr()[0])

    def forward(self, **batch: Any) -> torch.Tensor:
        """Loss of one micro batch (scalar)."""
        return self.deepspeed(**batch).loss

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of one micro batch and step at the end of the global batch.

        Raises:
            TrainingError: the loss is not finite.
        """
        if not bool(loss.isfinite()):
            raise TrainingError(
                "the loss is not finite",
                where=f"optimizer step {self.deepspeed.global_steps}",
                value=float(loss),
                do="Lower the stage's learning_rate or set clip_norm; the last checkpoint is kept.",
            )
        self.deepspeed.backward(loss)
        self.deepspeed.step()

    def agree(self, *flags: bool) -> list[bool]:
        """Each flag as any process has it: what all must do together (save, stop) is decided by all together."""
        if self.world == 1:
            return list(flags)
        import torch

        joint = torch.tensor([int(flag) for flag in flags], device=self.deepspeed.device)
        torch.distributed.all_reduce(joint, op=torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in joint.tolist()]

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """Whole tensors by the model's names on rank 0 where processes hold parts of them (ZeRO-3), else None.

        Every process must call it.
        """
        if self.deepspeed.zero_optimization_stage() < 3:
            return None
        return self.deepspeed._zero3_consolidated_16bit_state_dict()

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint that `resume` reads, then drop the one before it. Every process must call this.

        DeepSpeed returns when the files of all processes are there; `latest` then moves by rename.
        """
        tag = f"step-{step}"
        self.deepspeed.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
        if self.rank == 0:
            write_atomic(folder / LATEST, tag)
            for old in folder.glob("step-*"):
                if old.name != tag:
                    shutil.rmtree(old, ignore_errors=True)

    def resume(self, folder: Path) -> int:
        """Load the last checkpoint and return its step, or 0 where there is none.

        Raises:
            TrainingError: a checkpoint is named, but it is not there.
        """
        tag = self._last_saved(folder)
        if tag is None:
            return 0
        path, state = self.deepspeed.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise TrainingError(
                "the last checkpoint is gone", where=str(folder / LATEST), do=f"Remove {folder} to begin anew."
            )
        return int(state["step"])

    def _last_saved(self, folder: Path) -> str | None:
        """What `latest` names, as rank 0 sees it: another machine's view of a shared file system may be older."""
        latest = folder / LATEST
        tag = [latest.read_text().strip() if self.rank == 0 and latest.exists() else None]
        if self.world > 1:
            import torch

            torch.distributed.broadcast_object_list(tag, src=0, device=self.deepspeed.device)
        return tag[0]

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


def start(model: torch.nn.Module, stage: Stage, run: Run, total_steps: int) -> Engine:
    """Put `model` under DeepSpeed; parameters with `requires_grad` are trained."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        # DeepSpeed would spend minutes compiling a shared-memory op for CPU ranks that gloo does not need.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    config = {
        "train_batch_size": stage.batch,
        "train_micro_batch_size_per_gpu": stage.samples_at_once(world),
        "gradient_clipping": stage.clip_norm or 0.0,
        "zero_optimization": {"stage": run.zero},
        "bf16": {"enabled": run.precision != "fp32"},
        "steps_per_print": 1 << 30,
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        _decay_groups(model, stage.weight_decay), lr=stage.learning_rate, betas=BETAS, eps=1e-8
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=trained,
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(
            opt, lambda step: warmup_cosine(step, total_steps, stage.warmup_ratio)
        ),
        config=config,
    )
    return Engine(engine, engine.gradient_accumulation_steps())


def _decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: LayerNorm weights and biases do not decay, as in the reference."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

import subprocess
import sys


def test_the_serving_side_imports_no_transformers() -> None:
    """Prevents the vLLM plugin from depending on the training environment's transformers version."""
    names = ["tiling", "preprocess", "s2", "pooling", "projector", "visual", "config", "conversation", "splice"]
    names += ["tokenizer", "prompt", "batch", "tower", "nvila", "checkpoint", "generation"]
    program = "; ".join(f"import nvila.components.model.{name}" for name in names)
    program += "; import sys; print([m for m in ('transformers', 'tokenizers', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

import subprocess
import sys


def test_the_serving_side_imports_no_transformers() -> None:
    """Prevents the vLLM plugin from depending on the training environment's transformers version."""
    vision = ["tiling", "preprocess", "s2", "pooling", "projector", "visual", "tower"]
    text = ["conversation", "tokenizer", "prompt"]
    names = ["config.config", "splice", "batch", "nvila", "checkpoint.flat", "checkpoint.native", "decode.generation"]
    names += [*(f"vision.{name}" for name in vision), *(f"text.{name}" for name in text)]
    program = "; ".join(f"import nvila.components.model.{name}" for name in names)
    program += "; import sys; print([m for m in ('transformers', 'tokenizers', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

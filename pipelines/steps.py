"""The steps of the lifecycle in the order a person reads them: for the terminal's table and the README's."""

STEPS = {
    "resolve": "checks the recipe and cuts it into one slice per step",
    "preflight": "demonstration data; then memory, disk, versions, data files and port, before anything long starts",
    "validate": "every record of every source against Great Expectations; spoilt ones go to quarantine with a reason",
    "base": "the model that stage 1 starts from: published weights, or a small one made here",
    "prune-image": "DeltaLoss scores of the image SFT data by two reference models; the best of each source stay",
    "prune-video": "the same for the video SFT data",
    "train-1": "projector initialisation",
    "train-2": "vision-encoder pre-training",
    "train-3": "token-processor pre-training",
    "train-4": "image instruction tuning, on what pruning kept",
    "train-5": "video instruction tuning, on what pruning kept",
    "evaluate": "exact match on held-out data, after base and after every stage, beside question-only baselines",
    "gate": "stops a model that did not learn (exit code 3)",
    "quantize": "vision tower to W8A8, language model to W4A16, one compressed-tensors checkpoint",
    "evaluate-quantized": "the same questions to the quantized model, through vLLM",
    "gate-quantized": "stops a model that quantization harmed (exit code 3)",
    "register": "a version in the MLflow registry with metrics, card and lineage; alias `challenger`",
    "rollout": "serves the version, asks it the pinned prompts, moves the alias `champion`",
    "report": "one self-contained HTML page; written for rejected and failed runs too",
}
"""Name of each task, slice and status file -> what the step does."""

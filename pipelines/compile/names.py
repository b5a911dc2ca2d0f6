"""Names that the compiled pipeline shares with the chart and with the launcher of training jobs."""

VOLUME_CLAIM = "nvila"
"""Claim (read-write-many) that holds the store, the run folders and the data; mounted in every step."""
MOUNT = "/nvila"
CACHE_CLAIM = "nvila-cache"
"""Claim of downloaded weights, verified on arrival; may be local to a node."""
CACHE_MOUNT = "/cache"

CONFIG_MAP = "nvila-site"
"""ConfigMap in the namespace of the run: how the cluster is set up."""
LAUNCH_KEY = "NVILA_SITE"
"""Module that starts heavy work as a training job; without it the step's own pod does the work."""
CONFIG_KEYS = (
    LAUNCH_KEY,
    "NVILA_TRAINING_RUNTIME",
    "NVILA_GPUS_PER_NODE",
    "NVILA_GPU_RESOURCE",
    "NVILA_NODE_CPU",
    "NVILA_NODE_MEMORY",
    "NVILA_QUEUE",
    "NVILA_CACHE",
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
)
"""Each becomes an environment variable of that name; every one may be missing."""

SECRET = "nvila-credentials"
SECRET_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "HF_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "NVILA_API_KEY",
    "NVILA_WEBHOOK_URL",
    "NVILA_WEBHOOK_SECRET",
)
"""Like CONFIG_KEYS. Who knows the URL of a webhook may often post to it."""

"""Names that the compiled pipeline shares with the chart and with the launcher of training jobs."""

from nvila.components.contracts.environment import kept
from nvila.components.contracts.site import CONFIG_MAP as CONFIG_MAP
from nvila.components.contracts.site import OLD_KEYS

VOLUME_CLAIM = "nvila"
"""Claim (read-write-many) that holds the store, the run folders and the data; mounted in every step."""
MOUNT = "/nvila"
CACHE_CLAIM = "nvila-cache"
"""Claim of downloaded weights, verified on arrival; may be local to a node."""
CACHE_MOUNT = "/cache"

CERTIFICATES = "nvila-certificates"
"""ConfigMap with a site's own authorities, which may be missing; mounted in every step."""
CERTIFICATES_MOUNT = "/etc/nvila-certificates"

CONFIG_KEYS = (*kept("config"), *OLD_KEYS)
"""Each becomes an environment variable of that name; every one may be missing."""
SECRET = "nvila-credentials"
"""Has a key for each variable that steps take from it; which step takes which stands in the table of steps."""

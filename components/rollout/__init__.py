"""From a registered version to the one that users are served."""

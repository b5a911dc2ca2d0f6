"""Container images: how they are built (Containerfiles, build.py) and what is in them (sbom.py)."""

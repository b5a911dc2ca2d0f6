"""Demonstration sources: real pictures, digits and clips written in the format that a user would bring."""

from nvila.components.data.demo.build import ensure

__all__ = ["ensure"]

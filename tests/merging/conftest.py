"""Fixtures for tests of merging, whose searches evaluate models."""

from __future__ import annotations

from support.in_place import tokenizers_in_place

__all__ = ["tokenizers_in_place"]

"""Fixtures for tests of audits, which may fine-tune models."""

from __future__ import annotations

from support.in_place import tokenizers_in_place

__all__ = ["tokenizers_in_place"]

"""Whole models behind one door: a router sends every request to one of them. See docs/route.md."""

from solera_merge.route.models import RoutedModels

__all__ = ["RoutedModels"]

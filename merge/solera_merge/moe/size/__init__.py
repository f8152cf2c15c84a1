"""Making an existing MoE smaller: fewer experts, or none but a base with low-rank updates. See docs/moe-size.md."""

"""The study: what each way of hiding a model costs in learning, and what the best attacker gets. See docs/study/."""

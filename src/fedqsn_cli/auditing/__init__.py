"""What an attacker learns from proxies: hard invariants, exposure, recovered weights and recovered function."""

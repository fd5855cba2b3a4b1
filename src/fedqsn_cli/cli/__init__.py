"""The commands: one file each, options in, one call out. The package knows everyone, and nobody knows it."""

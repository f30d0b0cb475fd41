"""Established names of network modules, as `--network_module` and imports spell them: thin, over `adapters`."""

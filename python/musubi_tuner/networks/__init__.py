"""Established names of network modules, as `--network_module` and imports of users spell them: thin, over `adapters`."""

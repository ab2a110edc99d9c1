"""Runtimes for trained networks, one module each; a backend's module is imported only when it was chosen."""

"""Runtimes for trained networks and places for arrays, one module each; a library is imported only when chosen."""

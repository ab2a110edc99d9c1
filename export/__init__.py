"""The factory: what is built by hand or at install and shipped as files. Never imported at run time."""

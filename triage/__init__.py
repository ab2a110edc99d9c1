"""Volumes to findings: three states, never silence. As pure as `recon`; imports only `recon`."""

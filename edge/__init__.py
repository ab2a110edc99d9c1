"""What touches the world: settings, MRD, spool, worker, ledger, ZeroMQ, DICOM and the command line."""

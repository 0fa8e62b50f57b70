"""imagectl: a file per command, over the client."""

"""What a config needs and how long it takes on a stated cluster, before it runs: bytes of every phase, seconds of every phase, and the
layouts that do better. All of it is an estimate, from config.json and the settings alone; no torch.distributed, no GPU, no weights."""

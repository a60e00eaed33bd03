"""What a config needs and how long it takes on a stated cluster, before it runs: bytes of every phase, seconds of every phase, and the
layouts that do better. All of it is an estimate, from config.json and the settings alone; no torch.distributed, no GPU, no weights.

Of the other rooms it imports those whose arithmetic a run shares with it: config, sizes (what can be laid out), weights (shapes, the
stream's buckets), batching (micro-batches), mixing (the chance that a group becomes mixed) and flops; for its pictures charts and files;
logbook, whose rows of a run it puts beside a plan.
Neither policy/ nor rollout/: what is theirs is mirrored by constants, which tests compare.
"""

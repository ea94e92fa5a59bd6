"""The worker: claims a job, runs the engine as a process of its own, ships its journal, keeps the lease."""

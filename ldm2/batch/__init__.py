"""Many rows of prompts and options -> many sound files and a manifest: resumable, in shards, by several processes."""

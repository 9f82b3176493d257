"""Images in folders, shards and tars."""

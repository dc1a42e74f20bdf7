"""The mask lab's routes: resolve mask settings to a config, and draw the masks in a replica that starts on demand."""

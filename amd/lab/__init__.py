"""The mask lab: what student and teacher see of one clip at given mask settings, what is rebuilt, and what it costs."""

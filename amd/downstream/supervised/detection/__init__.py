"""Action detection: what each person of a key frame does, in the layout and by the measure of AVA (frame-mAP)."""

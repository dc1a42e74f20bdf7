"""Action detection: classify the actions of each person in a key frame, with AVA's file layout and frame-mAP."""

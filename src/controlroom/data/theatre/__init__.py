"""The theatre: a procedural world that draws a scene in about a millisecond and knows the truth of it.

Read `vocabulary` for what there is, `scene` for how a seed becomes a scene, `render` for pictures, `truth` for
keypoints, parts, depth, edges and boxes, `captions` for words, `pairs` for the same puppet twice, `edits` for
before/instruction/after, `doodle` for stick figures.
"""

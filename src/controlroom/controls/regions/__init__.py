"""Parts of the picture with prompts of their own, and canvases larger than the network can see."""

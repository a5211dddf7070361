"""From prompts to images and from images to answers."""

"""DeiT's training recipe through timm's factories, and the transforms of images."""

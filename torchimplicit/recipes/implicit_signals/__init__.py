"""A sound and a video by implicit representations and their explicit twins (Huang et al. 2021)."""

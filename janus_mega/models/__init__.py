"""The Janus network on megatron-core layers: embeddings, backbone, heads, losses, initialisation."""

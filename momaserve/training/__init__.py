"""Training: data, image tokenizers, language models, their routers, and the demo's build."""

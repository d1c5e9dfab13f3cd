"""The sample that ships: 5,000 digits and a small model trained on them. See README.md here."""

MODEL = "vit_sample_patch4_28"

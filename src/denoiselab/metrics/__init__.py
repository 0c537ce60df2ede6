"""What is measured on samples and on models."""

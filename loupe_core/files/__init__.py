"""What guards the disk: whole writes, photographs, downloads, checkpoints from elsewhere, ONNX files, kept pixels."""

"""Background Data Resampling (Li & Vasconcelos, CVPR 2020) at the paper's scale; see README.md here."""

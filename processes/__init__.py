"""The processes of a run: who they are, how they meet, where each computes, how a lost one is noticed."""

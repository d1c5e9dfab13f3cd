"""What a run tells people while it goes on, and the records that it leaves."""

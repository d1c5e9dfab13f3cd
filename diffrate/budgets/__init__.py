"""What a schedule is and costs, and how one is made to meet a budget: plain numbers, no torch needed."""

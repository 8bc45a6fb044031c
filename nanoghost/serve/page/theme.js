// Loaded before anything is drawn, so that nobody who reads in the dark is blinded first.
const chosenTheme = localStorage.getItem("nanoghost-theme");
if (chosenTheme) document.documentElement.dataset.theme = chosenTheme;

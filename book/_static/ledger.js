// The filter of the ledger: shows the claims with one verdict, on one ground or on any.
const form = document.querySelector(".ledger-filter");
const claims = [...document.querySelectorAll("details.claim")];
const grounds = [...form.elements.ground.options].map(option => option.value).filter(Boolean);

function fits(claim, verdict, ground) {
  const on = (ground ? [ground] : grounds).map(name => claim.dataset[name]).filter(Boolean);
  return verdict ? on.includes(verdict) : on.length > 0;
}

function filter() {
  const {verdict, ground} = form.elements;
  for (const claim of claims) claim.hidden = !fits(claim, verdict.value, ground.value);
  for (const topic of document.querySelectorAll(".ledger-topic"))
    topic.closest("section").hidden = !topic.querySelector("details.claim:not([hidden])");
  const shown = claims.filter(claim => !claim.hidden).length;
  form.querySelector("output").textContent = `${shown} of ${claims.length} claims`;
}

form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
filter(); // a browser may keep what was chosen when the page is loaded again

function unfold() {
  const claim = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (claim && claim.matches("details.claim")) { claim.open = true; claim.scrollIntoView(); }
}
addEventListener("hashchange", unfold);
unfold();

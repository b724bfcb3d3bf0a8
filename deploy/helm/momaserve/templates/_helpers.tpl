{{/* Names and labels */}}
{{- define "momaserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "momaserve.fullname" -}}
{{- $name := include "momaserve.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "momaserve.selectorLabels" -}}
app.kubernetes.io/name: {{ include "momaserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Without the chart's version: a new one alone is no reason to load a checkpoint again. */}}
{{- define "momaserve.podLabels" -}}
{{ include "momaserve.selectorLabels" . }}
app.kubernetes.io/component: server
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "momaserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "momaserve.podLabels" . }}
{{- end }}

{{- define "momaserve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "momaserve.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "momaserve.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" .Values.gpu.enabled)) }}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository $tag }}
{{- end }}
{{- end }}

{{/* Where the API keys come from; empty without keys. */}}
{{- define "momaserve.keySecret" -}}
{{- if .Values.auth.existingSecret }}
{{- .Values.auth.existingSecret }}
{{- else if .Values.auth.apiKeys }}
{{- printf "%s-api-keys" (include "momaserve.fullname" . | trunc 54 | trimSuffix "-") }}
{{- end }}
{{- end }}

{{- define "momaserve.keySecretKey" -}}
{{- ternary .Values.auth.existingSecretKey "api-keys" (not (empty .Values.auth.existingSecret)) }}
{{- end }}

{{/* Seconds between the start of termination and SIGKILL: the preStop hook, the drain, and 15 for
closing connections and the interpreter's own end. */}}
{{- define "momaserve.gracePeriod" -}}
{{- $drain := .Values.drain.timeoutSeconds | float64 | ceil | int }}
{{- $least := add .Values.drain.preStopSeconds $drain 15 | int }}
{{- $wanted := .Values.terminationGracePeriodSeconds | default $least | int }}
{{- if lt $wanted $least }}
{{- fail (printf "terminationGracePeriodSeconds is %d; preStopSeconds, drain.timeoutSeconds and 15 for closing connections need at least %d" $wanted $least) }}
{{- end }}
{{- $wanted }}
{{- end }}
